# Formats whose plugins are installed; if the program cannot tell, those that come with it.
_instar_formats() {
    local listed
    listed="$("${COMP_WORDS[0]/#\~/$HOME}" plugins 2>/dev/null |
        sed -n 's/^\([[:alnum:]_.-]*\) [0-9].*/\1/p; s/^ *other names: //p' | tr ',\n' '  ')"
    COMPREPLY=($(compgen -W "${listed:-@BUNDLED@}" -- "${cur}"))
}

# Images, devices and directories; where there is no image, every file.
_instar_images() {
    local word
    local -a files=() folders=() images=()
    mapfile -t files < <(compgen -f -- "${cur}")
    for word in "${files[@]}"; do
        if [[ -d "${word/#\~/$HOME}" ]]; then
            folders+=("${word}")
        elif [[ -b "${word/#\~/$HOME}" ]]; then
            images+=("${word}")
        else
            case "${word,,}" in
                @PATTERNS@) images+=("${word}") ;;
            esac
        fi
    done
    if [[ ${#images[@]} -eq 0 ]]; then
        COMPREPLY=("${files[@]}")
    else
        COMPREPLY=("${folders[@]}" "${images[@]}")
    fi
    compopt -o filenames
}

# Images below the overlay that the line names already, as -b takes them: from the overlay's directory on. Without an overlay,
# images.
_instar_members() {
    local word before="" overlay="" folder="" member
    for word in "${COMP_WORDS[@]:2}"; do
        word="${word//\\/}"
        if [[ "${word}" != -* && "${before}" != -b && "${before}" != --base && -f "${word/#\~/$HOME}" ]]; then
            overlay="${word/#\~/$HOME}"
        fi
        before="${word}"
    done
    if [[ "${overlay}" == */* ]]; then
        folder="${overlay%/*}/"
    fi
    if [[ -n "${overlay}" ]]; then
        while IFS= read -r member; do
            member="${member#"${folder}"}"
            # A backslash stands for a character that is not shown as it is.
            if [[ "${member}" == "${cur//\\/}"* && "${member}" != *\\* ]]; then
                COMPREPLY+=("${member}")
            fi
        done < <("${COMP_WORDS[0]/#\~/$HOME}" info --color never --backing-chain "${overlay}" 2>/dev/null |
            sed -n 's/^image: //p' | sed 1d)
    fi
    if [[ ${#COMPREPLY[@]} -eq 0 ]]; then
        _instar_images
    else
        compopt -o filenames
    fi
}


# Codes of `instar explain`, in either case.
_instar_codes() {
    COMPREPLY=($(compgen -W "@CODES@" -- "${cur^^}"))
}

# Options of the new image's format, as the program lists them: the last one of a list with commas.
_instar_options() {
    local word before="" format=raw flag=-O long=--target-format listed
    if [[ "${COMP_WORDS[1]}" == create ]]; then
        flag=-f long=--format
    fi
    for word in "${COMP_WORDS[@]:2}"; do
        if [[ "${before}" == "${flag}" || "${before}" == "${long}" ]] && [[ "${word}" != "=" ]]; then
            format="${word}"
        fi
        [[ "${word}" == "=" ]] || before="${word}"
    done
    listed="$("${COMP_WORDS[0]/#\~/$HOME}" "${COMP_WORDS[1]}" "${flag}" "${format}" -o help 2>/dev/null |
        sed -n 's/^ *\([[:alnum:]_.-]*=\)<value>.*/\1/p')"
    COMPREPLY=($(compgen -P "${cur%"${cur##*,}"}" -W "${listed}" -- "${cur##*,}"))
    compopt -o nospace
}

# Bash takes a list of options with values for several words. If the current one is a part of it, complete the name that it ends with.
_instar_within_options() {
    local at="${COMP_CWORD}"
    while [[ "${at}" -ge 2 && ("${COMP_WORDS[at - 1]}" == "=" || "${COMP_WORDS[at]}" == "=") ]]; do
        at=$((at - 1))
    done
    if [[ "${at}" -eq "${COMP_CWORD}" || ! "${COMP_WORDS[at - 1]} ${COMP_WORDS[at]}" =~ ^(-o|--options)\ |\ --options$ ]]; then
        return 1
    fi
    if [[ "${cur}" == *,* ]]; then
        _instar_options
    elif [[ "${COMP_WORDS[at]}" == --options && "${at}" -ge $((COMP_CWORD - 2)) ]]; then
        [[ "${cur}" == "=" ]] && cur=""
        _instar_options
    fi
    return 0
}
