"""The data formats, writer and reader side by side, and one folder per dataset with its prepare.py."""
