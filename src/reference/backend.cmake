flashprefill_add_backend(Reference SOURCES backend.cc rows.cc select.cc energies.cc flashprefill.cc sketch.cc
                         vertical_slash.cc flexprefill.cc minference.cc attend.cc
                         top_p.cc strided.cc xattention.cc rrattention.cc sparge_attn.cc prism.cc sample_attention.cc)
