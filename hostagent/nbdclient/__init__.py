"""Our side of an NBD conversation: dialling, one connection, streams of bytes over it, and what a server offers."""
