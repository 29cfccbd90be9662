"""Where images are: NBD exports, files, other data daemons; all behind `base.ImageBackend`."""
