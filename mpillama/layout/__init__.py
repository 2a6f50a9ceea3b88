"""How a weight matrix lies in file and memory: weight types, quantised blocks, row lanes."""
