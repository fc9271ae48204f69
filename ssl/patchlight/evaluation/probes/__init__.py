"""Classification of images: nearest neighbors, a linear classifier, fine-tuning."""
