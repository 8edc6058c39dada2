// The text of bundled_text() in evaluate.hpp, as it is. The path is relative to the source root, which -I gives.

  .section .rodata
  .global bitwright_bundled_text
  .global bitwright_bundled_text_end
bitwright_bundled_text:
  .incbin "examples/tinystories-4m/tinystories_valid.txt"
bitwright_bundled_text_end:

  .section .note.GNU-stack, "", %progbits
