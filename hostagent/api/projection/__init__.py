"""The agent on D-Bus: objects that show what the store says, verbs that ask the use-cases. It decides nothing."""
