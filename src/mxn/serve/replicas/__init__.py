"""Replicas that are not processes of this machine: other mxn servers, OpenAI-compatible servers."""
