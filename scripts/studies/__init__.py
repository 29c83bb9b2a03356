"""Studies of forgetting: images and ptychography, and their page."""
