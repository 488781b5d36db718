"""Images, captions, adapters, networks and weights as people have them on disk."""
