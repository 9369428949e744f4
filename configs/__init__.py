"""The gin files, installed as package data; ``flora`` searches this folder by default."""
