"""Key tables between the layouts that people hold and the Diffusers layout that the networks use."""
