"""A thin serving engine over `sarathi_kernels`: run from the checkout as `python -m engine demo | chat`.

    llm -> scheduler -> policies -> request        llm -> runner -> model, batch -> sarathi_kernels
"""
