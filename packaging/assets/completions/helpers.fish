# Formats whose plugins are installed; if the program cannot tell, those that come with it.
function __fish_instar_formats
    set -l listed (command instar plugins 2>/dev/null |
        sed -n 's/^\([[:alnum:]_.-]*\) [0-9].*/\1/p; s/^ *other names: //p' | string split ', ')
    if test -z "$listed"
        set listed @BUNDLED@
    end
    printf '%s\tformat\n' $listed
end

# Images and directories first, then other files.
function __fish_instar_images
    __fish_complete_suffix --description=image @SUFFIXES@
end

# Images below the overlay that the line names already, as -b takes them: from the overlay's directory on. Without an overlay,
# images.
function __fish_instar_members
    set -l words (commandline -opc)
    set -l before
    set -l overlay
    for word in $words[3..-1]
        if not string match -q -- '-*' $word; and not contains -- "$before" -b --base; and test -f "$word"
            set overlay $word
        end
        set before $word
    end
    set -l after (commandline -op)
    if test -z "$overlay"; and test -f "$after[-1]"
        set overlay $after[-1]
    end
    if test -z "$overlay"
        __fish_instar_images
        return
    end
    set -l folder (string match -r '^.*/' -- $overlay)
    for member in (command instar info --color never --backing-chain $overlay 2>/dev/null | sed -n 's/^image: //p' | sed 1d)
        # A backslash stands for a character that is not shown as it is.
        string match -q '*\\\\*' -- $member
        or string replace -r -- '^'(string escape --style=regex -- "$folder") '' $member\timage\ below
    end
end


# Codes of `instar explain`.
function __fish_instar_codes
    printf '%s\tcode\n' @CODES@
end

# Options of the new image's format, as the program lists them: the last one of a list with commas.
function __fish_instar_options
    set -l words (commandline -opc)
    set -l flag -O
    set -l long --target-format
    if test "$words[2]" = create
        set flag -f
        set long --format
    end
    set -l format raw
    set -l before
    for word in $words[3..-1]
        if contains -- "$before" $flag $long
            set format $word
        else if string match -q -- "$long=*" $word
            set format (string replace -- "$long=" '' $word)
        end
        set before $word
    end
    set -l head (string replace -r -- '^--options=' '' (commandline -ct) | string match -r -- '^.*,')
    command instar $words[2] $flag $format -o help 2>/dev/null |
        string replace -rf -- '^ *([\w.-]+=)<value> *- (.*)' "$head"'$1'\t'$2'
end
