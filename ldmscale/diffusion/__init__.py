"""The mathematics of diffusion as functions: noise schedule, forward process, guidance and samplers."""
