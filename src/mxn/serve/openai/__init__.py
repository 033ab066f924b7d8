"""The OpenAI protocol: request and response types, one file for each endpoint family."""
