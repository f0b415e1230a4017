"""Speed and memory, always side by side with the published procedure and with the floor; see README.md."""
