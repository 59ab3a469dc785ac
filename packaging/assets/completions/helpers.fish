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

