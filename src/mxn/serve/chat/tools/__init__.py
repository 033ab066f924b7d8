"""Tool calls in the words of model families: formats, parsers of answers, grammars that force."""
