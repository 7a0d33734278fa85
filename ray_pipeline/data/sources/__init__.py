"""One module for each kind of data set that `ray-pipeline prepare` and `simulate` can write."""
