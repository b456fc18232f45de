"""For all tests of this folder, before any of them imports the hub's library, which reads it then."""
import os

os.environ["HF_HUB_OFFLINE"] = "1"
