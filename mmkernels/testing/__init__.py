"""Small models of each family, which `mmkernels support`, tests and benchmarks run; and the parts to build them of."""
