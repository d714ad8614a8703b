"""What a run will take, from configs and the headers of files alone: see `estimating.py`."""
