"""Read and write images and masks, with a module for each family of formats."""
