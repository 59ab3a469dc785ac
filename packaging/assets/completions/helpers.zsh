# Formats whose plugins are installed; if the program cannot tell, those that come with it.
_instar_formats() {
    local -a listed
    listed=(${=${(f)"$(_call_program formats instar plugins 2>/dev/null |
        sed -n 's/^\([[:alnum:]_.-]*\) [0-9].*/\1/p; s/^ *other names: //p' | tr ',' ' ')"}})
    (( $#listed )) || listed=(@BUNDLED@)
    compadd -a listed
}

# Images, devices and directories; where there is no image, every file.
_instar_images() {
    _files -g '(#i)@GLOB@(-.,-%b)'
}

# Images below the overlay that the line names already, as -b takes them: from the overlay's directory on. Without an overlay,
# images.
_instar_members() {
    local word before overlay folder
    local -a members
    for word in "${(@Q)words[2,-1]}"; do
        [[ $word != -* && $before != (-b|--base) && -f ${~word} ]] && overlay=${~word}
        before=$word
    done
    if [[ -n $overlay ]]; then
        [[ $overlay == */* ]] && folder=${overlay%/*}/
        members=(${(f)"$(instar info --color never --backing-chain $overlay 2>/dev/null | sed -n 's/^image: //p' | sed 1d)"})
        # A backslash stands for a character that is not shown as it is.
        members=(${members:#*\\*})
        members=(${members#$folder})
    fi
    if (( $#members )); then
        compadd -f -a members
    else
        _instar_images
    fi
}


# Codes of `instar explain`, in either case.
_instar_codes() {
    compadd -M 'm:{a-z}={A-Z}' -- @CODES@
}

# Options of the new image's format, as the program lists them: the last one of a list with commas.
_instar_options() {
    local word before format=raw flag=-O long=--target-format
    local -a listed
    [[ $words[1] == create ]] && flag=-f long=--format
    for word in "${(@Q)words[2,-1]}"; do
        [[ $before == ($flag|$long) ]] && format=$word
        [[ $word == $long=* ]] && format=${word#*=}
        before=$word
    done
    compset -P '*,'
    [[ $PREFIX == *=* ]] && return 1
    listed=(${(f)"$(_call_program options instar $words[1] $flag ${(q)format} -o help 2>/dev/null |
        sed -n 's/^ *\([[:alnum:]_.-]*\)=<value>.*/\1/p')"})
    compadd -S '=' -a listed
}
