"""The papers' tables as commands: to list, to type, and to try with small images."""
