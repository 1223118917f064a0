"""Checks: what facts mean. Pure; each yields findings, and names the mend of what is wrong."""
