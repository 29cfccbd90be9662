"""The data daemon: image bytes over HTTP(S), in the dialect of ovirt-imageio.

A process of its own, which may open no image by itself: it reaches them through NBD sockets and through descriptors
that the agent hands it. Stand-alone it may also serve files below `data.allow_paths`, with its user's permissions.
"""
