"""A server for a fused model, with the endpoints of OpenAI's API that its modalities allow."""
