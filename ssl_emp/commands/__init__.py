"""The commands, one file each. Configs end here: what they call takes values."""
