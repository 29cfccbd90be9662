"""Images that move through the data daemon: the daemon itself, as the agent's child, and its tickets."""
