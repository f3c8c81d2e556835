"""Statistics of a layer's inputs on one actor."""
