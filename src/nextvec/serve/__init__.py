"""The server: an OpenAI-compatible endpoint that batches requests patch by patch, and a page that shows how a patch is chosen."""
