"""Images: which files make a data set, how they are decoded, where their pixels are kept."""
