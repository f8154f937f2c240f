"""A trained model from the folder of its run: samples, films and edits into files."""
