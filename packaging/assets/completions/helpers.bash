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

