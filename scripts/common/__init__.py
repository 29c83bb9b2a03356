"""Code that several packages of scripts share."""
