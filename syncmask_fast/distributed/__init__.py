"""Several processes that train as one: the process group, sharded batches, gradient reduction and batch norm."""
