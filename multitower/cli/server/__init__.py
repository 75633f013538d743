"""A server for a fused model with an OpenAI-compatible API."""
