"""The one kernel that multiplies by packed weights of all formats."""
