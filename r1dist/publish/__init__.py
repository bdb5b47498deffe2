"""What becomes of a trained model: its model card, and its upload to the Hugging Face hub."""
