"""Jobs: a config checked, run into a folder, and what stays there of it."""
