"""The work: expert weights, their kernels, the MoE layer, and the spawning of experts."""
