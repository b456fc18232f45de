"""Set before any test of this folder imports the hub's library, which reads it then."""
import os

os.environ["HF_HUB_OFFLINE"] = "1"
