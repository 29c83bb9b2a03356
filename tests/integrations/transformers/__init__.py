"""Jobs with the Trainer of Hugging Face."""
