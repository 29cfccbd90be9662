"""Generated stories: random work on a tree of real images, with kills, judged by a model."""
