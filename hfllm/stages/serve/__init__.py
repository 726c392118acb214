"""The serve recipe: flags.py (light), requests and the server."""
