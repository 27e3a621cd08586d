# SPDX-License-Identifier: Apache-2.0
# The ISA ladder's compile flags, one set a rung. A file compiled with them has internal linkage
# only (.ci/run checks with nm), so that the linker can never hand its code to another CPU. No
# kernel throws; xsimd's noexcept would leave a weak reference to the exception personality.
# The vector layer's integers wrap on every rung; plain ones do when they are told to.
set(MOEOPS_FLAGS_scalar -fwrapv)
set(MOEOPS_FLAGS_avx2 -mavx2 -mfma -mf16c -fno-exceptions)
set(MOEOPS_FLAGS_avx512 ${MOEOPS_FLAGS_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl)
set(MOEOPS_FLAGS_avx512_vnni ${MOEOPS_FLAGS_avx512} -mavx512vnni)
set(MOEOPS_FLAGS_avx512_bf16 ${MOEOPS_FLAGS_avx512_vnni} -mavx512bf16)
set(MOEOPS_FLAGS_amx ${MOEOPS_FLAGS_avx512_bf16} -mamx-tile -mamx-int8 -mamx-bf16)

# Those of the sources whose name ends with _<rung>.cc get the rung's flags.
function(moeops_isa_sources)
  foreach(source IN LISTS ARGN)
    foreach(isa scalar avx2 avx512 avx512_vnni avx512_bf16 amx)
      if(source MATCHES "_${isa}\\.cc$")
        set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${MOEOPS_FLAGS_${isa}}")
      endif()
    endforeach()
  endforeach()
endfunction()
