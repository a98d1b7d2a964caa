"""avfast: fast audio-visual self-supervised learning."""
