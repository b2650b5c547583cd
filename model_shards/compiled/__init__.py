"""A rank's part of the model as programs of compiled functions (model_shards.kernels), for CPUs that have them.

What is computed is what the modules say that these were made of; they take the modules' weights over.
"""
