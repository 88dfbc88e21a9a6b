"""How fast this machine trains and decodes, and with how much memory."""
