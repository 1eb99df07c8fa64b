"""The native file format: a compiled model in one zip file, of JSON and safetensors alone.

    manifest.json              format, version, writers, and the size and SHA-256 of every other member
    module.json                the model's modules and tensors, the call it was compiled for, rule and options
    graph.json                 the LocalGraph, as `graphlocal.text.to_document` gives it
    trace.json                 the operations of the training graph, with all their arguments
    evaluation.json            the same in evaluation mode, or why there is none
    weights.safetensors        parameters and buffers, each once however often it is tied
    error_weights.safetensors  the feedback maps E and the twins
    constants.safetensors      tensors that forward spells out
    inputs.safetensors         the example inputs

Nothing in a file is ever executed or imported when it is read, and nothing is unpickled: operators are looked up by
name in a table (`operators`), and every size is checked before memory is taken (`container`, `tensors`).
"""
