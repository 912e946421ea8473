# Chooses CMAKE_CUDA_ARCHITECTURES for the compiler CMAKE_CUDA_COMPILER. The environment variable CUDAARCHS, which CMake
# itself reads at the first configuration alone, goes before what an earlier configuration chose. A wheel for everyone
# sets it to the complete list (tools/wheel.sh).

if(NOT "$ENV{CUDAARCHS}" STREQUAL "")
  set(CMAKE_CUDA_ARCHITECTURES "$ENV{CUDAARCHS}" CACHE STRING "CUDA architectures" FORCE)
endif()
if(CMAKE_CUDA_ARCHITECTURES)
  return()
endif()

execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-code OUTPUT_VARIABLE _known ERROR_QUIET TIMEOUT 20)
# TORCH_CUDA_ARCH_LIST: numbers, as "8.0;9.0a+PTX", and torch's names of generations.
set(_AMPERE "8.0;8.6+PTX")
set(_ADA "8.9+PTX")
set(_HOPPER "9.0+PTX")
set(_BLACKWELL "10.0;12.0+PTX")
string(REGEX REPLACE "[ ,;]+" ";" _list "$ENV{TORCH_CUDA_ARCH_LIST}")
foreach(_name ${_list})
  string(TOUPPER ${_name} _upper)
  foreach(_one ${_${_upper}} ${_name})
    string(REGEX MATCH "^([0-9]+)\\.([0-9])([af]?)(\\+PTX)?$" _ "${_one}")
    set(_number ${CMAKE_MATCH_1}${CMAKE_MATCH_2})
    if(_number GREATER_EQUAL 80 AND CMAKE_MATCH_4)
      list(APPEND CMAKE_CUDA_ARCHITECTURES ${_number}${CMAKE_MATCH_3})
    elseif(_number GREATER_EQUAL 80)
      list(APPEND CMAKE_CUDA_ARCHITECTURES ${_number}${CMAKE_MATCH_3}-real)
    elseif(NOT DEFINED _${_upper})
      message(WARNING "TORCH_CUDA_ARCH_LIST: ${_one} is left out; the kernels are for 8.0 and later")
    endif()
  endforeach()
endforeach()
if(CMAKE_CUDA_ARCHITECTURES)
  return()
endif()

# The GPUs of this machine, if the compiler knows them all. Every architecture takes minutes to compile.
find_program(NVIDIA_SMI nvidia-smi)
if(NVIDIA_SMI)
  execute_process(COMMAND ${NVIDIA_SMI} --query-gpu=compute_cap --format=csv,noheader OUTPUT_VARIABLE _list ERROR_QUIET
                  TIMEOUT 20)
  string(REGEX MATCHALL "[0-9]+\\.[0-9]+" _list "${_list}")
  list(REMOVE_DUPLICATES _list)
  foreach(_capability ${_list})
    string(REPLACE "." "" _number ${_capability})
    if(_number LESS 80 OR NOT "${_known}" MATCHES "sm_${_number}[^0-9]")
      set(CMAKE_CUDA_ARCHITECTURES "")
      break()
    endif()
    string(REGEX REPLACE "^90$" "90a" _number ${_number})  # wgmma is in code for 90a alone
    list(APPEND CMAKE_CUDA_ARCHITECTURES ${_number}-real)
  endforeach()
endif()
if(NOT CMAKE_CUDA_ARCHITECTURES)  # PTX alone, which the driver of whatever GPU comes compiles when it is first used
  set(CMAKE_CUDA_ARCHITECTURES 80-virtual)
  message(STATUS "no GPU is visible here: set CUDAARCHS, say to 90a-real, for machine code instead of PTX")
endif()
